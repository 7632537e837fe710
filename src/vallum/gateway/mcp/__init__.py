"""What is said to and by servers of the Model Context Protocol: read strictly, judged, filtered. Pure."""
