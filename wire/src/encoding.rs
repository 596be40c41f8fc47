//! Pages in fewer bytes.
