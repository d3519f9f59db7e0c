"""Where data comes from: the catalog, local files, the hub, and text of this machine."""
