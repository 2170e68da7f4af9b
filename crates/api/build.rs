//! Compiles ../../proto; no protoc needed.

use std::path::{Path, PathBuf};

/// In the build's folder: the descriptors of all that was compiled.
const DESCRIPTORS: &str = "descriptors.bin";

fn main() -> anyhow::Result<()> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    let mut files = vec!["agent.proto", "shim.proto"];
    if std::env::var_os("CARGO_FEATURE_CRI").is_some() {
        files.push("cri/v1/api.proto");
    }
    println!("cargo:rerun-if-changed={}", proto.display());
    let files: Vec<PathBuf> = files.into_iter().map(|file| proto.join(file)).collect();
    let descriptors = protox::compile(&files, [&proto])?;
    let out = std::env::var_os("OUT_DIR").map(PathBuf::from).unwrap_or_default();
    std::fs::write(out.join(DESCRIPTORS), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .emit_rerun_if_changed(false)
        .bytes(".")
        .compile_fds(descriptors)?;
    Ok(())
}
