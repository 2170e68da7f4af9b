//! What server, shim and agent mean by the same words: ids, the shim's orders, a pod's network,
//! and the rules of a sandbox's life. Pure data: no files, no runtime, no protobuf.

pub mod id;
pub mod network;
pub mod sandbox;
pub mod shim;
pub mod words;

pub use id::{ContainerId, InvalidId, SandboxId};
