"""Networks of policies and their encoders."""
