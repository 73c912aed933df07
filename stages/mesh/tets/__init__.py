"""Signed distances on a lattice of tetrahedra: made, sealed, solid, and their surface."""
