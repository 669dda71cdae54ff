"""``python -m classifier_emergence``: the command line without its script."""

from classifier_emergence.cli.app import main

if __name__ == "__main__":
    main()
