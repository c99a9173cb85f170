"""Stage 4: what the trained SAEs are worth, on tokens that training did not see."""
