"""The formats that can be migrated: one table of correspondences each."""
