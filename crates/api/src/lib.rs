//! Generated protobuf code and nothing else: the CRI (`cri`), server to shim (`shim`) and shim to
//! agent (`agent`). The sources, with their documentation, are in `proto/`.

#![allow(missing_docs, clippy::all, clippy::unwrap_used)]

/// A FileDescriptorSet of the interfaces that are compiled in.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// CRI v1, cri-api v0.37.
#[cfg(feature = "cri")]
pub mod cri {
    tonic::include_proto!("runtime.v1");
}

/// Shim to agent.
pub mod agent {
    pub mod v1 {
        tonic::include_proto!("a3sbox.agent.v1");
    }
}

/// Server to shim.
pub mod shim {
    pub mod v1 {
        tonic::include_proto!("a3sbox.shim.v1");
    }
}
