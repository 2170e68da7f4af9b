//! `a3s-box-shim template`: boots a guest once and leaves what clones are made of.

use a3s_box_sys::{namespace, tap};
use a3s_box_vmm::template::{self, TemplateConfig};
use anyhow::Context;
use std::{fs, path::Path};

/// Builds the template that the JSON file `config` orders.
pub fn run(config: &Path) -> anyhow::Result<()> {
    let text = fs::read(config).with_context(|| format!("read {}", config.display()))?;
    let config: TemplateConfig =
        serde_json::from_slice(&text).with_context(|| format!("read {}", config.display()))?;
    // The template's card is plugged into nothing: a tap in a namespace that ends with us.
    namespace::unshare_network().context("leave the network")?;
    let tap = tap::create("tap0").context("create the template's tap")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let built = template::build(&config, tap, |volumes| async move {
            // The stream is kept open until the template is saved: the guest's share must not see
            // its first request fail.
            tokio::task::spawn_blocking(move || {
                volumes.set_nonblocking(false)?;
                a3s_box_volume::handshake(&volumes)
            })
            .await?
        });
        built.await.context("build the template")
    })
}
