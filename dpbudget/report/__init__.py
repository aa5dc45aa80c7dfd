"""Figures of a privacy profile; nothing here is imported before it is asked for."""
