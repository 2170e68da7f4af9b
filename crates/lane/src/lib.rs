//! Lanes: virtio-serial ports of a guest that carry the bytes of one exec each, past the shim and past gRPC.
//!
//! ```text
//! server --[lease]--> shim                       lends its end of the port
//! server <========[frame]========> QEMU <-port-> agent
//! ```
//!
//! A lane has only bytes: the start of the process, its window, its end and every error stay with the call
//! that goes through the shim. A machine has [`COUNT`] lanes; an exec that finds none free, or none at all
//! because the pod runs on the node's kernel, has its bytes in its call.
//!
//! Nobody tidies a lane up. Whatever the last session left in it, on the way or half written, the next one
//! skips: each side begins with the session's mark, and listens from there on.

pub mod frame;
pub mod lease;

/// Lanes of a machine.
pub const COUNT: u32 = 4;

/// A lane's name among the guest's ports.
pub fn name(number: u32) -> String {
    format!("lane{number}")
}

/// What a session's bytes begin with, drawn anew for each.
pub type Mark = [u8; 16];
