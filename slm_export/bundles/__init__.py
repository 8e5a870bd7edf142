"""The folder that an export leaves behind: whole or not at all, and checked again later."""
