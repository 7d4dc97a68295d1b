"""HTTP below the endpoints: bodies, limits, errors, connections and logs."""
