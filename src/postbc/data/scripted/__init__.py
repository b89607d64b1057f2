"""Scripted operators: six people of three qualities who demonstrate robosuite's Lift and Can."""
