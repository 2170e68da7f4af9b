//! The CRI's two services as one plain list: which RPC goes to which function.
//!
//! Each RPC runs in one span, makes one call into the file named after it, and logs one line if
//! that fails. What is not there yet answers Unimplemented with its name.

use crate::{
    Server,
    status::{Failure, NodeError, status},
    version,
};
use a3s_box_api::cri::{
    self, image_service_server::ImageService, runtime_service_server::RuntimeService,
};
use std::{future::Future, sync::Arc};
use tokio_stream::Empty;
use tonic::{Code, Request, Response, Status};
use tracing::{Instrument, info, info_span, warn};

/// Both services, answered by one server.
#[derive(Clone)]
pub struct Service(pub Arc<Server>);

type Answer<T> = Result<Response<T>, Status>;
type Stream<T> = Empty<Result<T, Status>>;

/// What the span of an RPC names.
#[allow(dead_code, reason = "sandboxes and images are wired in one by one")]
enum About<'a> {
    Node,
    Sandbox(&'a str),
    Container(&'a str),
    Image(&'a str),
}

impl Service {
    /// Runs one RPC in its span.
    async fn call<Q, A, E, F>(
        &self,
        rpc: &'static str,
        about: About<'_>,
        request: Q,
        run: impl FnOnce(Arc<Server>, Q) -> F,
    ) -> Answer<A>
    where
        F: Future<Output = Result<A, E>>,
        E: Failure,
    {
        let span = match about {
            About::Node => info_span!("cri", rpc),
            About::Sandbox(id) => info_span!("cri", rpc, sandbox = id),
            About::Container(id) => info_span!("cri", rpc, container = id),
            About::Image(name) => info_span!("cri", rpc, image = name),
        };
        let answer = run(self.0.clone(), request).instrument(span.clone()).await;
        answer.map(Response::new).map_err(|error| span.in_scope(|| refused(&error)))
    }
}

/// Logs the failure and says it to the client.
fn refused(error: &impl Failure) -> Status {
    let answer = status(error);
    let (code, message) = (answer.code(), answer.message());
    match code {
        Code::Internal | Code::Unknown | Code::DataLoss => warn!(?code, "{message}"),
        _ => info!(?code, "{message}"),
    }
    answer
}

/// The answer of an RPC that this server does not have.
fn not_there<T>(rpc: &'static str) -> Answer<T> {
    Err(status(&NodeError::NotThere(rpc)))
}

#[tonic::async_trait]
impl RuntimeService for Service {
    type StreamPodSandboxesStream = Stream<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = Stream<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = Stream<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Stream<cri::StreamPodSandboxStatsResponse>;
    type GetContainerEventsStream = Stream<cri::ContainerEventResponse>;
    type StreamPodSandboxMetricsStream = Stream<cri::StreamPodSandboxMetricsResponse>;

    async fn version(&self, request: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        self.call("Version", About::Node, request.into_inner(), version::version).await
    }

    async fn run_pod_sandbox(
        &self,
        _: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        not_there("RunPodSandbox")
    }

    async fn stop_pod_sandbox(
        &self,
        _: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        not_there("StopPodSandbox")
    }

    async fn remove_pod_sandbox(
        &self,
        _: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        not_there("RemovePodSandbox")
    }

    async fn pod_sandbox_status(
        &self,
        _: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        not_there("PodSandboxStatus")
    }

    async fn list_pod_sandbox(
        &self,
        _: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        not_there("ListPodSandbox")
    }

    async fn stream_pod_sandboxes(
        &self,
        _: Request<cri::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        not_there("StreamPodSandboxes")
    }

    async fn create_container(
        &self,
        _: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        not_there("CreateContainer")
    }

    async fn start_container(
        &self,
        _: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        not_there("StartContainer")
    }

    async fn stop_container(
        &self,
        _: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        not_there("StopContainer")
    }

    async fn remove_container(
        &self,
        _: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        not_there("RemoveContainer")
    }

    async fn list_containers(
        &self,
        _: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        not_there("ListContainers")
    }

    async fn stream_containers(
        &self,
        _: Request<cri::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        not_there("StreamContainers")
    }

    async fn container_status(
        &self,
        _: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        not_there("ContainerStatus")
    }

    async fn update_container_resources(
        &self,
        _: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        not_there("UpdateContainerResources")
    }

    async fn reopen_container_log(
        &self,
        _: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        not_there("ReopenContainerLog")
    }

    async fn exec_sync(&self, _: Request<cri::ExecSyncRequest>) -> Answer<cri::ExecSyncResponse> {
        not_there("ExecSync")
    }

    async fn exec(&self, _: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        not_there("Exec")
    }

    async fn attach(&self, _: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        not_there("Attach")
    }

    async fn port_forward(
        &self,
        _: Request<cri::PortForwardRequest>,
    ) -> Answer<cri::PortForwardResponse> {
        not_there("PortForward")
    }

    async fn container_stats(
        &self,
        _: Request<cri::ContainerStatsRequest>,
    ) -> Answer<cri::ContainerStatsResponse> {
        not_there("ContainerStats")
    }

    async fn list_container_stats(
        &self,
        _: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        not_there("ListContainerStats")
    }

    async fn stream_container_stats(
        &self,
        _: Request<cri::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        not_there("StreamContainerStats")
    }

    async fn pod_sandbox_stats(
        &self,
        _: Request<cri::PodSandboxStatsRequest>,
    ) -> Answer<cri::PodSandboxStatsResponse> {
        not_there("PodSandboxStats")
    }

    async fn list_pod_sandbox_stats(
        &self,
        _: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        not_there("ListPodSandboxStats")
    }

    async fn stream_pod_sandbox_stats(
        &self,
        _: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        not_there("StreamPodSandboxStats")
    }

    async fn update_runtime_config(
        &self,
        _: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        not_there("UpdateRuntimeConfig")
    }

    async fn status(&self, _: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        not_there("Status")
    }

    async fn checkpoint_container(
        &self,
        _: Request<cri::CheckpointContainerRequest>,
    ) -> Answer<cri::CheckpointContainerResponse> {
        not_there("CheckpointContainer")
    }

    async fn checkpoint_pod(
        &self,
        _: Request<cri::CheckpointPodRequest>,
    ) -> Answer<cri::CheckpointPodResponse> {
        not_there("CheckpointPod")
    }

    async fn restore_pod(
        &self,
        _: Request<cri::RestorePodRequest>,
    ) -> Answer<cri::RestorePodResponse> {
        not_there("RestorePod")
    }

    async fn get_container_events(
        &self,
        _: Request<cri::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        not_there("GetContainerEvents")
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        not_there("ListMetricDescriptors")
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        not_there("ListPodSandboxMetrics")
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        not_there("StreamPodSandboxMetrics")
    }

    async fn runtime_config(
        &self,
        _: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        not_there("RuntimeConfig")
    }

    async fn update_pod_sandbox_resources(
        &self,
        _: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        not_there("UpdatePodSandboxResources")
    }
}

#[tonic::async_trait]
impl ImageService for Service {
    type StreamImagesStream = Stream<cri::StreamImagesResponse>;

    async fn list_images(
        &self,
        _: Request<cri::ListImagesRequest>,
    ) -> Answer<cri::ListImagesResponse> {
        not_there("ListImages")
    }

    async fn stream_images(
        &self,
        _: Request<cri::StreamImagesRequest>,
    ) -> Answer<Self::StreamImagesStream> {
        not_there("StreamImages")
    }

    async fn image_status(
        &self,
        _: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        not_there("ImageStatus")
    }

    async fn pull_image(
        &self,
        _: Request<cri::PullImageRequest>,
    ) -> Answer<cri::PullImageResponse> {
        not_there("PullImage")
    }

    async fn remove_image(
        &self,
        _: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        not_there("RemoveImage")
    }

    async fn image_fs_info(
        &self,
        _: Request<cri::ImageFsInfoRequest>,
    ) -> Answer<cri::ImageFsInfoResponse> {
        not_there("ImageFsInfo")
    }
}
