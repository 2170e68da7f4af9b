//! The CRI's two services as one plain list: which RPC goes to which function.
//!
//! Each RPC runs in one span, makes one call into the file named after it, and logs one line if
//! that fails. What is not there yet answers Unimplemented with its name.

use crate::{
    Server, container_create, container_events, container_list, container_log, container_start,
    container_stats, container_status, container_stop, container_update, exec_sync, image_fs_info,
    image_list, image_pull, image_remove, image_status, node_status, runtime_config, sandbox_list,
    sandbox_metrics, sandbox_run, sandbox_stats, sandbox_status, sandbox_stop, sandbox_update,
    status::{Failure, NodeError, status},
    stream_lists::in_batches,
    streaming, version,
};
use a3s_box_api::cri::{
    self, image_service_server::ImageService, runtime_service_server::RuntimeService,
};
use std::{future::Future, pin::Pin, sync::Arc, time::Instant};
use tonic::{Code, Request, Response, Status};
use tracing::{Instrument, debug, info, info_span, warn};

/// Both services, answered by one server.
#[derive(Clone)]
pub struct Service(pub Arc<Server>);

type Answer<T> = Result<Response<T>, Status>;
type Stream<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

/// RPCs that start something; what can wait makes way for them.
const STARTING: [&str; 3] = ["RunPodSandbox", "CreateContainer", "StartContainer"];

/// What the span of an RPC names.
enum About {
    Node,
    Pod(String),
    Sandbox(String),
    Container(String),
    Image(String),
}

impl About {
    fn pod(request: &cri::RunPodSandboxRequest) -> Self {
        let metadata = request.config.as_ref().and_then(|config| config.metadata.as_ref());
        let name = metadata.map(|pod| format!("{}/{}", pod.namespace, pod.name));
        Self::Pod(name.unwrap_or_default())
    }

    fn sandbox(id: &str) -> Self {
        Self::Sandbox(id.to_owned())
    }

    fn container(id: &str) -> Self {
        Self::Container(id.to_owned())
    }

    fn image(image: Option<&cri::ImageSpec>) -> Self {
        Self::Image(image.map(|image| image.image.clone()).unwrap_or_default())
    }

    fn span(self, rpc: &'static str) -> tracing::Span {
        match self {
            Self::Node => info_span!("cri", rpc),
            Self::Pod(pod) => info_span!("cri", rpc, pod),
            Self::Sandbox(sandbox) => info_span!("cri", rpc, sandbox),
            Self::Container(container) => info_span!("cri", rpc, container),
            Self::Image(image) => info_span!("cri", rpc, image),
        }
    }
}

impl Service {
    /// Runs one RPC in its span.
    async fn call<Q, A, E, F>(
        &self,
        rpc: &'static str,
        about: About,
        request: Q,
        run: impl FnOnce(Arc<Server>, Q) -> F,
    ) -> Answer<A>
    where
        F: Future<Output = Result<A, E>>,
        E: Failure,
    {
        let (span, since) = (about.span(rpc), Instant::now());
        let deps = self.0.node.sandboxes.deps();
        let _starting = STARTING.contains(&rpc).then(|| deps.spares.yield_to_start());
        let answer = run(self.0.clone(), request).instrument(span.clone()).await;
        let answer = answer.map(Response::new).map_err(|error| span.in_scope(|| refused(&error)));
        let code = answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
        deps.instruments.answered(rpc, code, since.elapsed());
        answer
    }
}

/// Logs the failure and says it to the client.
fn refused(error: &impl Failure) -> Status {
    let answer = status(error);
    let (code, message) = (answer.code(), answer.message());
    match code {
        Code::Internal | Code::Unknown | Code::DataLoss => warn!(?code, "{message}"),
        // Kubelet asks after what it has just removed.
        Code::NotFound => debug!(?code, "{message}"),
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
        let request = request.into_inner();
        let about = About::Node;
        self.call("Version", about, request, version::version).await
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        let request = request.into_inner();
        let about = About::pod(&request);
        self.call("RunPodSandbox", about, request, |server, request| {
            sandbox_run::run_pod_sandbox(server.node.clone(), request)
        })
        .await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        let request = request.into_inner();
        let about = About::sandbox(&request.pod_sandbox_id);
        self.call("StopPodSandbox", about, request, |server, request| {
            sandbox_stop::stop_pod_sandbox(server.node.clone(), request)
        })
        .await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        let request = request.into_inner();
        let about = About::sandbox(&request.pod_sandbox_id);
        self.call("RemovePodSandbox", about, request, |server, request| {
            sandbox_stop::remove_pod_sandbox(server.node.clone(), request)
        })
        .await
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let about = About::sandbox(&request.pod_sandbox_id);
        self.call("PodSandboxStatus", about, request, |server, request| {
            sandbox_status::pod_sandbox_status(server.node.clone(), request)
        })
        .await
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let request = request.into_inner();
        let about = About::Node;
        self.call("ListPodSandbox", about, request, |server, request| {
            sandbox_list::list_pod_sandbox(server.node.clone(), request)
        })
        .await
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let request = cri::ListPodSandboxRequest { filter: request.into_inner().filter };
        let list = self.list_pod_sandbox(Request::new(request)).await?.into_inner().items;
        let wrap = |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes };
        Ok(Response::new(Box::pin(in_batches(list, wrap))))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        let request = request.into_inner();
        let about = About::sandbox(&request.pod_sandbox_id);
        self.call("CreateContainer", about, request, |server, request| {
            container_create::create_container(server.node.clone(), request)
        })
        .await
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        let request = request.into_inner();
        let about = About::container(&request.container_id);
        self.call("StartContainer", about, request, |server, request| {
            container_start::start_container(server.node.clone(), request)
        })
        .await
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        let request = request.into_inner();
        let about = About::container(&request.container_id);
        self.call("StopContainer", about, request, |server, request| {
            container_stop::stop_container(server.node.clone(), request)
        })
        .await
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        let request = request.into_inner();
        let about = About::container(&request.container_id);
        self.call("RemoveContainer", about, request, |server, request| {
            container_start::remove_container(server.node.clone(), request)
        })
        .await
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        let request = request.into_inner();
        let about = About::Node;
        self.call("ListContainers", about, request, |server, request| {
            container_list::list_containers(server.node.clone(), request)
        })
        .await
    }

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let request = cri::ListContainersRequest { filter: request.into_inner().filter };
        let list = self.list_containers(Request::new(request)).await?.into_inner().containers;
        let wrap = |containers| cri::StreamContainersResponse { containers };
        Ok(Response::new(Box::pin(in_batches(list, wrap))))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        let request = request.into_inner();
        let about = About::container(&request.container_id);
        self.call("ContainerStatus", about, request, |server, request| {
            container_status::container_status(server.node.clone(), request)
        })
        .await
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        let about = About::container(&request.container_id);
        self.call("UpdateContainerResources", about, request, |server, request| {
            container_update::update_container_resources(server.node.clone(), request)
        })
        .await
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        let request = request.into_inner();
        let about = About::container(&request.container_id);
        self.call("ReopenContainerLog", about, request, |server, request| {
            container_log::reopen_container_log(server.node.clone(), request)
        })
        .await
    }

    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Answer<cri::ExecSyncResponse> {
        let request = request.into_inner();
        let about = About::container(&request.container_id);
        self.call("ExecSync", about, request, |server, request| {
            exec_sync::exec_sync(server.node.clone(), request)
        })
        .await
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        let request = request.into_inner();
        let about = About::container(&request.container_id);
        self.call("Exec", about, request, streaming::exec).await
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        let request = request.into_inner();
        let about = About::container(&request.container_id);
        self.call("Attach", about, request, streaming::attach).await
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Answer<cri::PortForwardResponse> {
        let request = request.into_inner();
        let about = About::sandbox(&request.pod_sandbox_id);
        self.call("PortForward", about, request, streaming::port_forward).await
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Answer<cri::ContainerStatsResponse> {
        let request = request.into_inner();
        let about = About::container(&request.container_id);
        self.call("ContainerStats", about, request, |server, request| {
            container_stats::container_stats(server.node.clone(), request)
        })
        .await
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        let request = request.into_inner();
        let about = About::Node;
        self.call("ListContainerStats", about, request, |server, request| {
            container_stats::list_container_stats(server.node.clone(), request)
        })
        .await
    }

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let request = cri::ListContainerStatsRequest { filter: request.into_inner().filter };
        let list = self.list_container_stats(Request::new(request)).await?.into_inner().stats;
        let wrap = |container_stats| cri::StreamContainerStatsResponse { container_stats };
        Ok(Response::new(Box::pin(in_batches(list, wrap))))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Answer<cri::PodSandboxStatsResponse> {
        let request = request.into_inner();
        let about = About::sandbox(&request.pod_sandbox_id);
        self.call("PodSandboxStats", about, request, |server, request| {
            sandbox_stats::pod_sandbox_stats(server.node.clone(), request)
        })
        .await
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        let request = request.into_inner();
        let about = About::Node;
        self.call("ListPodSandboxStats", about, request, |server, request| {
            sandbox_stats::list_pod_sandbox_stats(server.node.clone(), request)
        })
        .await
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let request = cri::ListPodSandboxStatsRequest { filter: request.into_inner().filter };
        let list = self.list_pod_sandbox_stats(Request::new(request)).await?.into_inner().stats;
        let wrap = |pod_sandbox_stats| cri::StreamPodSandboxStatsResponse { pod_sandbox_stats };
        Ok(Response::new(Box::pin(in_batches(list, wrap))))
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        let request = request.into_inner();
        let about = About::Node;
        self.call("UpdateRuntimeConfig", about, request, runtime_config::update_runtime_config)
            .await
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        let request = request.into_inner();
        let about = About::Node;
        self.call("Status", about, request, node_status::status).await
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
        let events = container_events::get_container_events(&self.0.node);
        Ok(Response::new(Box::pin(events)))
    }

    async fn list_metric_descriptors(
        &self,
        request: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        let request = request.into_inner();
        let about = About::Node;
        self.call("ListMetricDescriptors", about, request, |server, request| {
            sandbox_metrics::list_metric_descriptors(server.node.clone(), request)
        })
        .await
    }

    async fn list_pod_sandbox_metrics(
        &self,
        request: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        let request = request.into_inner();
        let about = About::Node;
        self.call("ListPodSandboxMetrics", about, request, |server, request| {
            sandbox_metrics::list_pod_sandbox_metrics(server.node.clone(), request)
        })
        .await
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let request = Request::new(cri::ListPodSandboxMetricsRequest {});
        let list = self.list_pod_sandbox_metrics(request).await?.into_inner().pod_metrics;
        let wrap =
            |pod_sandbox_metrics| cri::StreamPodSandboxMetricsResponse { pod_sandbox_metrics };
        Ok(Response::new(Box::pin(in_batches(list, wrap))))
    }

    async fn runtime_config(
        &self,
        request: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        let request = request.into_inner();
        let about = About::Node;
        self.call("RuntimeConfig", about, request, runtime_config::runtime_config).await
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        let about = About::sandbox(&request.pod_sandbox_id);
        self.call("UpdatePodSandboxResources", about, request, |server, request| {
            sandbox_update::update_pod_sandbox_resources(server.node.clone(), request)
        })
        .await
    }
}

#[tonic::async_trait]
impl ImageService for Service {
    type StreamImagesStream = Stream<cri::StreamImagesResponse>;

    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Answer<cri::ListImagesResponse> {
        let request = request.into_inner();
        let about = About::Node;
        self.call("ListImages", about, request, image_list::list_images).await
    }

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Answer<Self::StreamImagesStream> {
        let request = cri::ListImagesRequest { filter: request.into_inner().filter };
        let list = self.list_images(Request::new(request)).await?.into_inner().images;
        let wrap = |images| cri::StreamImagesResponse { images };
        Ok(Response::new(Box::pin(in_batches(list, wrap))))
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        let request = request.into_inner();
        let about = About::image(request.image.as_ref());
        self.call("ImageStatus", about, request, image_status::image_status).await
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Answer<cri::PullImageResponse> {
        let request = request.into_inner();
        let about = About::image(request.image.as_ref());
        self.call("PullImage", about, request, image_pull::pull_image).await
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        let request = request.into_inner();
        let about = About::image(request.image.as_ref());
        self.call("RemoveImage", about, request, image_remove::remove_image).await
    }

    async fn image_fs_info(
        &self,
        request: Request<cri::ImageFsInfoRequest>,
    ) -> Answer<cri::ImageFsInfoResponse> {
        let request = request.into_inner();
        let about = About::Node;
        self.call("ImageFsInfo", about, request, image_fs_info::image_fs_info).await
    }
}
