"""From a name to a language model: registry, wheels, the hub, folders, adapters."""
