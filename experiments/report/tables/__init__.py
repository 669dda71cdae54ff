"""The paper's tables: a function of a model's rows each, marked ``table``; cells that they share are in ``cells``."""
