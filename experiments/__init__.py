"""One file a stage: read parameters, call the library, write one result."""
