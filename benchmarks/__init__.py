"""Side by side with peers: each script prints a table and writes its figures."""
