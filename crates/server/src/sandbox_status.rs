//! PodSandboxStatus: the record, and when asked verbosely what only the shim knows.

use crate::{
    container_status,
    node::Node,
    sandbox::{
        Sandbox, SandboxError, View, now,
        spec::{Boundary, SandboxSpec},
    },
    sandbox_list::{metadata, state},
};
use a3s_box_api::{cri, shim::v1 as shim};
use serde_json::json;
use std::{collections::HashMap, sync::Arc, time::Duration};

/// Verbose status does not wait longer for a shim that hangs.
const PATIENCE: Duration = Duration::from_secs(2);

/// The status of one sandbox and its containers.
pub async fn pod_sandbox_status(
    node: Arc<Node>,
    request: cri::PodSandboxStatusRequest,
) -> Result<cri::PodSandboxStatusResponse, SandboxError> {
    let sandbox = node.sandboxes.get(&request.pod_sandbox_id)?;
    let view = sandbox.view();
    if !view.listed() {
        return Err(SandboxError::no_sandbox(&request.pod_sandbox_id));
    }
    let info = if request.verbose { info(&sandbox, &view).await } else { HashMap::new() };
    Ok(cri::PodSandboxStatusResponse {
        status: Some(status(&view)),
        info,
        containers_statuses: container_status::all(&view),
        timestamp: now(),
    })
}

/// The status without what only the shim knows.
pub fn status(view: &View) -> cri::PodSandboxStatus {
    let record = &view.record;
    let ips = record.network.as_ref().map(|network| network.ips.as_slice()).unwrap_or_default();
    let mut ips = ips.iter().map(ToString::to_string);
    let network = cri::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
    };
    let options = namespaces(&record.spec);
    cri::PodSandboxStatus {
        id: record.id.to_string(),
        metadata: Some(metadata(view)),
        state: state(view).into(),
        created_at: record.created_at,
        network: Some(network),
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace { options: Some(options) }),
        }),
        labels: record.spec.labels.clone().into_iter().collect(),
        annotations: record.spec.annotations.clone().into_iter().collect(),
        runtime_handler: record.spec.runtime_handler.clone(),
    }
}

fn namespaces(spec: &SandboxSpec) -> cri::NamespaceOption {
    let nodes = spec.node_namespaces;
    let mode = |node: bool| {
        if node { cri::NamespaceMode::Node } else { cri::NamespaceMode::Pod }
    };
    let pid = match mode(nodes.pid) {
        cri::NamespaceMode::Pod if !spec.shared_pid => cri::NamespaceMode::Container,
        mode => mode,
    };
    let userns_options = spec.user_namespace.map(|user_namespace| {
        let (uids, gids) = user_namespace.mappings();
        let mode = cri::NamespaceMode::Pod.into();
        cri::UserNamespace { mode, uids: vec![uids], gids: vec![gids] }
    });
    cri::NamespaceOption {
        network: mode(nodes.network).into(),
        pid: pid.into(),
        ipc: mode(nodes.ipc).into(),
        userns_options,
        ..Default::default()
    }
}

async fn info(sandbox: &Sandbox, view: &View) -> HashMap<String, String> {
    let asked = tokio::time::timeout(PATIENCE, sandbox.shim().state()).await;
    let told = asked.ok().and_then(Result::ok).unwrap_or_default();
    HashMap::from([("info".to_owned(), describe(view, &told).to_string())])
}

fn describe(view: &View, told: &shim::StateResponse) -> serde_json::Value {
    let record = &view.record;
    let boundary = record.boundary.clone().unwrap_or_default();
    let kind = record.spec.boundary();
    let vm = (kind == Boundary::Microvm).then(|| {
        json!({
            "vcpus": record.size().vcpus,
            "memoryMb": record.size().memory_mb,
            // More while the guest cannot spare what is to be taken.
            "memoryMbNow": told.memory_mb,
            "vcpusNow": told.vcpus,
            "accel": told.accel,
            "pid": told.pid,
            "kernelRelease": boundary.kernel_release,
        })
    });
    json!({
        "boundary": kind.to_string(),
        "state": view.state_name(),
        "unclear": view.unclear,
        "endReason": record.end_reason,
        "vm": vm,
        "kernelRelease": boundary.kernel_release,
        // crictl and tests look for the process of the sandbox here.
        "pid": told.pid,
        "stagesMs": boundary.stages_ms,
        "consoleTail": told.console_tail,
        "resized": record.resized,
        "config": record.spec,
    })
}
