//! A pod's network: its namespace, the CNI plugins that fill it, and the joint between what they
//! made and the virtual machine.
//!
//! ```text
//! netns/create -> tap/create -> Cni::add -> bridge::join -> bridge::guest_network
//! Cni::del -> netns/remove
//! ```
//!
//! The namespace is named after the sandbox, and what CNI was asked for is saved before the first
//! plugin runs, so the second line needs nothing but the sandbox's id and may be repeated. Nothing
//! here changes the calling thread's namespace: what must be done inside another one is done on a
//! thread of its own, which ends with it. So the server may itself live in any network namespace; the
//! pods' outer ends are then in that one.
//!
//! Not here: sandboxes, virtual machines, and the guest's side of the network.

pub mod bridge;
pub mod cni;
mod error;
mod netlink;
pub mod netns;
pub mod tap;

pub use cni::{Attached, Attachment, Bandwidth, Cni, Dns, PortMapping, Protocol};
pub use error::NetError;
