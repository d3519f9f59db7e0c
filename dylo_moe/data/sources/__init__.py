"""The sources of data: the catalog, local files, the hub, and text of this machine."""
