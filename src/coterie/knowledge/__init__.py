"""What a business knows: documents, tables, databases and graphs, searched under permissions, shown with sources."""
