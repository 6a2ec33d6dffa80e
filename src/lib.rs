//! Cauldron.
