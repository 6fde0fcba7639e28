"""Topology, the Ulysses exchange and the global-token loss."""
