"""How the pocket weights are made from nothing: one trainer a module, one loop for all."""
