"""What users see of all that is counted and simulated: one HTML file, and a trace for Perfetto."""
