"""Scripted operators: eight people of four qualities who demonstrate robosuite's Lift, Can and Square, and LIBERO's kitchens."""
