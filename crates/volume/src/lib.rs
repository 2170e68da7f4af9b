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
//! Layout of the share: `images/NAME` are files that never change, `volumes/CONTAINER/N` and
//! `volumes/pod/N` are what one of the pod's containers mounts, or several. What is cached for how long follows from that.

#[cfg(feature = "guest")]
mod guest;
#[cfg(feature = "host")]
mod host;
mod wire;

#[cfg(feature = "guest")]
pub use guest::{mount, pump};
#[cfg(feature = "host")]
pub use host::{
    Access, Error, Orders, Owner, Place, Propagation, Result, Share, Source, answer, attach,
    detach, handshake, serve, serve_mount,
};
pub use wire::{MAX_MESSAGE, OUT_HEADER, is_answered, u32_at, u64_at};
