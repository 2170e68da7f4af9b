//! Calls of the server, and everything that comes of one.

use super::place::{Base, Place};
use crate::{
    sandbox::{View, cni_network::attachment, configure::configure, shim_process, spec::Boundary},
    sandbox_status,
    streaming::{attach_session, exec_session, port_forward_session},
};
use a3s_box_api::cri::{
    image_service_server::ImageService, runtime_service_server::RuntimeService,
};
use a3s_box_types::{SandboxId, network::GuestNetwork};
use prost::Message;
use std::fmt::Write;
use tokio_stream::StreamExt;
use tonic::{Request, Status};

/// What comes of a request, as words in no order: lists and maps have none that stays.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The answer, what the shims and CNI are told, and which state all is in.
    pub effects: Vec<String>,
    /// What statuses say afterwards.
    pub told: Vec<String>,
}

impl Place {
    pub async fn outcome(&self, rpc: &str, bytes: &[u8]) -> Result<Outcome, Status> {
        let shim = self.pod.parse::<SandboxId>().map(|id| self.host.shim(&id)).unwrap();
        shim.orders.lock().unwrap().clear();
        shim.told.lock().unwrap().clear();
        let answer = self.answer(rpc, bytes).await;
        let mut effects =
            answer.map_err(|error| Status::new(error.code(), self.plain(error.message())))?;
        let mut told = String::new();
        for (_, view) in self.service.0.node.sandboxes.all() {
            write!(effects, " {} ", self.sandbox(&view).await).unwrap();
            write!(told, "{:?} ", sandbox_status::status(&view)).unwrap();
            write!(told, "{:?} ", crate::container_status::all(&view)).unwrap();
        }
        for order in &*shim.orders.lock().unwrap() {
            let mut order = order.clone();
            let spec = std::mem::take(&mut order.container.as_mut().unwrap().oci_spec);
            write!(effects, "{order:?} {}", String::from_utf8_lossy(&spec)).unwrap();
        }
        effects += &shim.told.lock().unwrap().join(" ");
        write!(effects, " {:?} {}", self.service.0.images.list(), self.subnets()).unwrap();
        Ok(Outcome { effects: self.words(&effects), told: self.words(&told) })
    }

    /// The sandbox as it is outside of the server, and its containers' states.
    async fn sandbox(&self, view: &View) -> String {
        let (id, spec) = (&view.record.id, view.record.spec_in_force());
        let mut text = format!(
            "{} {:?} {:?} {} {:?} {} {:?} ",
            view.state_name(),
            configure(id, &spec, &GuestNetwork::default()),
            attachment(id, &spec),
            shim_process::parent(&spec),
            shim_process::limits(&spec),
            spec.host_limits.oom_score_adj,
            spec.node_namespaces,
        );
        if spec.boundary() == Boundary::Microvm {
            write!(text, "{:?} ", spec.size).unwrap();
        }
        for container in view.containers.values() {
            write!(text, "{} {} ", container.state_name(), container.stop_signal).unwrap();
        }
        if id.as_str() != self.pod {
            text += &self.privileged_container(id).await;
        }
        text
    }

    /// What CNI is told of subnets.
    fn subnets(&self) -> String {
        let cni = self.service.0.config.root.join("cni");
        let records = std::fs::read_dir(cni).unwrap().flatten();
        let files = records.filter_map(|folder| std::fs::read_dir(folder.path()).ok());
        let texts = files.flatten().flatten().map(|file| std::fs::read_to_string(file.path()));
        texts.flatten().collect()
    }

    /// What becomes of a privileged container in this sandbox, where that depends on the sandbox.
    async fn privileged_container(&self, id: &SandboxId) -> String {
        let mut request = self.create_request();
        request.pod_sandbox_id = id.to_string();
        let config = request.config.as_mut().unwrap();
        let linux = config.linux.as_mut().unwrap();
        linux.security_context.as_mut().unwrap().privileged = true;
        match self.service.create_container(Request::new(request)).await {
            Ok(_) => self.host.shim(id).orders.lock().unwrap()[0].log_path.clone(),
            Err(error) => error.message().to_owned(),
        }
    }

    async fn answer(&self, rpc: &str, bytes: &[u8]) -> Result<String, Status> {
        let (service, node) = (&self.service, &self.service.0.node);
        macro_rules! unary {
            ($method:ident) => {{
                let request = Request::new(Message::decode(bytes).unwrap());
                Ok(format!("{:?}", service.$method(request).await?.into_inner()))
            }};
        }
        macro_rules! stream {
            ($method:ident) => {{
                let request = Request::new(Message::decode(bytes).unwrap());
                let all: Vec<_> = service.$method(request).await?.into_inner().collect().await;
                Ok(format!("{all:?}"))
            }};
        }
        macro_rules! session {
            ($make:expr) => {{
                let session = $make.map_err(|error| crate::status::status(&error))?;
                Ok(format!("{session:?}"))
            }};
        }
        match rpc {
            "Version" => unary!(version),
            "RunPodSandbox" => unary!(run_pod_sandbox),
            "StopPodSandbox" => unary!(stop_pod_sandbox),
            "RemovePodSandbox" => unary!(remove_pod_sandbox),
            "PodSandboxStatus" => unary!(pod_sandbox_status),
            "ListPodSandbox" => unary!(list_pod_sandbox),
            "StreamPodSandboxes" => stream!(stream_pod_sandboxes),
            "CreateContainer" => unary!(create_container),
            "StartContainer" => unary!(start_container),
            "StopContainer" => unary!(stop_container),
            "RemoveContainer" => unary!(remove_container),
            "ListContainers" => unary!(list_containers),
            "StreamContainers" => stream!(stream_containers),
            "ContainerStatus" => unary!(container_status),
            "UpdateContainerResources" => unary!(update_container_resources),
            "ReopenContainerLog" => unary!(reopen_container_log),
            "ExecSync" => unary!(exec_sync),
            "Exec" => session!(exec_session(node, Message::decode(bytes).unwrap())),
            "Attach" => session!(attach_session(node, &Message::decode(bytes).unwrap())),
            "PortForward" => session!(port_forward_session(node, &Message::decode(bytes).unwrap())),
            "ContainerStats" => unary!(container_stats),
            "ListContainerStats" => unary!(list_container_stats),
            "StreamContainerStats" => stream!(stream_container_stats),
            "PodSandboxStats" => unary!(pod_sandbox_stats),
            "ListPodSandboxStats" => unary!(list_pod_sandbox_stats),
            "StreamPodSandboxStats" => stream!(stream_pod_sandbox_stats),
            "UpdateRuntimeConfig" => unary!(update_runtime_config),
            "Status" => unary!(status),
            "CheckpointContainer" => unary!(checkpoint_container),
            "CheckpointPod" => unary!(checkpoint_pod),
            "RestorePod" => unary!(restore_pod),
            "UpdatePodSandboxResources" => unary!(update_pod_sandbox_resources),
            "ListImages" => unary!(list_images),
            "StreamImages" => stream!(stream_images),
            "ImageStatus" => unary!(image_status),
            "PullImage" => unary!(pull_image),
            "RemoveImage" => unary!(remove_image),
            other => panic!("{other} is a new call: say here how it is made"),
        }
    }

    /// With the same names for what is another one each time: ids, times, folders.
    fn plain(&self, text: &str) -> String {
        let mut text = text.replace(self.path("").trim_end_matches('/'), "DIR");
        let [first, second] = &self.made;
        for (id, name) in
            [(&self.pod, "POD"), (&self.running, "RUNNING"), (first, "FIRST"), (second, "SECOND")]
        {
            text = text.replace(id, name);
        }
        let mut plain = String::new();
        for word in text.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
            let run = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
            plain.push_str(same_word(run));
            plain.push_str(&word[run.len()..]);
        }
        plain
    }

    fn words(&self, text: &str) -> Vec<String> {
        let text = self.plain(text);
        let words = text.split(|c: char| !c.is_ascii_alphanumeric());
        let mut words: Vec<_> = words.filter(|word| !word.is_empty()).map(str::to_owned).collect();
        words.sort_unstable();
        words
    }
}

fn same_word(word: &str) -> &str {
    let hex = word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    match word.len() {
        16.. if digits => "TIME",
        12.. if hex => "ID",
        _ => word,
    }
}

/// The same request leads to the same outcome on every node; otherwise each field would have an effect.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_has_the_same_outcome_on_every_node() {
    for base in [Base::Microvm, Base::Rich, Base::Host] {
        for rpc in ["CreateContainer", "RunPodSandbox", "StopContainer", "ListContainers"] {
            let mut outcomes = Vec::new();
            for _ in 0..2 {
                let place = Place::new(base).await;
                outcomes.push(place.outcome(rpc, &place.request(rpc)).await.unwrap());
            }
            let [first, second] = outcomes.try_into().unwrap();
            assert_eq!(only_in(&first.effects, &second.effects), [""; 0], "{rpc} {base:?}");
            assert_eq!(first, second, "{rpc} {base:?}");
        }
    }
}

fn only_in<'a>(these: &'a [String], others: &[String]) -> Vec<&'a str> {
    these.iter().filter(|word| !others.contains(word)).map(String::as_str).collect()
}
