"""Running NumPyro programs: their sites, particles, simulated observations."""
