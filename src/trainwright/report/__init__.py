"""Owns: reports for people: the plan of a run as text, its curves as a PNG, its report as one HTML file.
Leaves to others: measuring, and deciding when a report is written."""
