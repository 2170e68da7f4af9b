//! A pod's share: its image layers and volumes, served by the host, mounted by the guest.
//!
//! ```text
//! guest                                   host
//! container ── /share ── kernel's FUSE    shim ── Share: bind mounts under one folder
//!                            │ /dev/fuse            │ (mount propagation)
//!                          pump ══ byte stream ══ serve: own process, confined
//! ```
//!
//! The byte stream is the virtio-serial port `volumes`. It carries FUSE's own messages back to
//! back: each begins with its length. The host's half knows nothing of VMs, the guest's nothing of
//! files; both are tested against each other over a socket pair.
//!
//! Layout of the share: `images/NAME` are files that never change, `volumes/CONTAINER/N` are what
//! the pod's containers mount. What is cached for how long follows from that.

#[cfg(feature = "guest")]
mod guest;
#[cfg(feature = "host")]
mod host;
mod wire;

#[cfg(feature = "guest")]
pub use guest::{mount, pump};
#[cfg(feature = "host")]
pub use host::{Access, Error, Propagation, Result, Share, handshake, serve};
