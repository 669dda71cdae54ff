"""The paper's tables: a function of rows each (see ``table``), listed by stage in ``__main__``."""
