//! QMP: QEMU's control protocol.

pub mod framing;
