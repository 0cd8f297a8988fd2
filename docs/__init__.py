"""The documentation: pages, and what makes their tables, pictures and site."""
