"""Measure this project and other engines, and fill the tables of the pages with the results."""
