"""Values, ops, and regions: the graph that everything below the capture works on."""
