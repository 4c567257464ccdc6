"""What is measured on the method's outputs: separation, subspaces, mediation, sensitivity, cost."""
