"""Measure this project: its services, its engine beside other engines, and the pages that show the results."""
