"""What an export found out, for people and programs; bundles compared."""
