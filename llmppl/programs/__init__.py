"""Running programs: their sites, particles, simulated observations, random states."""
