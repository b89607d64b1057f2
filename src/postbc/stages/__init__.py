"""The stages: for each a schema (its options) and a function that runs one seed of it. The command line and the recipes call them."""
