//! Status: whether pods can run here, and what each runtime handler can do.

use crate::{Server, status::NodeError, status::chain, templates::Chosen};
use a3s_box_api::cri;
use serde_json::json;
use std::{collections::HashMap, sync::Arc};

/// The node's conditions, handlers and features.
pub async fn status(
    server: Arc<Server>,
    request: cri::StatusRequest,
) -> Result<cri::StatusResponse, NodeError> {
    let network = server.cni.ready().map_err(|error| chain(&error));
    let runtime = server.templates.missing().map_or(Ok(()), Err);
    let info = if request.verbose { info(&server, network.as_deref()) } else { HashMap::new() };
    let conditions = vec![
        condition("RuntimeReady", "GuestIncomplete", runtime),
        condition("NetworkReady", "CNINotReady", network.map(drop)),
    ];
    Ok(cri::StatusResponse {
        status: Some(cri::RuntimeStatus { conditions }),
        info,
        runtime_handlers: server.config.handlers.keys().map(|name| handler(name)).collect(),
        features: Some(cri::RuntimeFeatures {
            supplemental_groups_policy: true,
            ..Default::default()
        }),
    })
}

fn condition(r#type: &str, reason: &str, state: Result<(), String>) -> cri::RuntimeCondition {
    let (status, reason, message) = match state {
        Ok(()) => (true, String::new(), String::new()),
        Err(why) => (false, reason.to_owned(), why),
    };
    cri::RuntimeCondition { r#type: r#type.to_owned(), status, reason, message }
}

fn handler(name: &str) -> cri::RuntimeHandler {
    // The guest's kernel does it all, and is the same for every handler.
    let features =
        cri::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: true };
    cri::RuntimeHandler { name: name.to_owned(), features: Some(features) }
}

/// What a person asks after when something is slow or missing.
fn info(server: &Server, network: Result<&str, &String>) -> HashMap<String, String> {
    let config = &server.config;
    let accel = match server.templates.chosen() {
        Some(Chosen { accel, why }) => json!({ "accel": accel, "why": why }),
        None => json!({ "accel": null, "why": "being found out" }),
    };
    let settings = json!({
        "socket": config.socket,
        "rootDir": config.root,
        // critest mounts here to see whether the file system can be id-mapped.
        "stateDir": config.state,
        "shim": config.shim,
        "cniConfDir": config.network.conf_dir,
        "cniBinDirs": config.network.bin_dirs,
        "qemu": config.vm.qemu,
        "kernel": config.vm.kernel,
        "initramfs": config.vm.initramfs,
        "handlers": config.handlers.keys().collect::<Vec<_>>(),
    });
    let network = match network {
        Ok(name) => json!({ "default": name }),
        Err(why) => json!({ "default": null, "why": why }),
    };
    [("config", settings), ("accelerator", accel), ("network", network)]
        .map(|(key, value)| (key.to_owned(), value.to_string()))
        .into()
}
