"""Scripted operators: eight people of four qualities who demonstrate robosuite's Lift and Can, and LIBERO's kitchens."""
