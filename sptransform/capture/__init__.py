"""From Dynamo's graph to a functional ATen graph."""
