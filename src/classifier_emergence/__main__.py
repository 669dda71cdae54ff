"""``python -m classifier_emergence``: the command line without its script."""

from classifier_emergence.interrupts import end_program

if __name__ == "__main__":
    end_program()
    from classifier_emergence.cli.app import main

    main()
