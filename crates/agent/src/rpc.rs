//! The gRPC surface: one method per call, each handed to its module in a task of its own, so that a
//! caller who goes away leaves no half-made thing.

use crate::{
    agent::Agent,
    attach, container, disks,
    error::{Error, Step},
    exec, pod_limit, port_forward, processors, sandbox, stats, volume_mounts,
};
use a3s_box_api::agent::v1::{self as api, agent_server, exec_input};
use std::{future::Future, sync::Arc};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Messages on their way to a slow caller, beyond what the connection itself holds.
const WAITING: usize = 2;
/// As large as a CRI request may be.
const LARGEST_REQUEST: usize = 16 << 20;

/// The service.
#[derive(Debug, Clone)]
pub struct Service(Arc<Agent>);

/// The service for a connection.
pub fn service(agent: &Arc<Agent>) -> agent_server::AgentServer<Service> {
    agent_server::AgentServer::new(Service(Arc::clone(agent)))
        .max_decoding_message_size(LARGEST_REQUEST)
}

async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<Response<T>, Status> {
    let done = tokio::spawn(work).await.map_err(std::io::Error::other).step("task")?;
    Ok(Response::new(done?))
}

type Answers<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl agent_server::Agent for Service {
    type ContainerIoStream = Answers<api::IoOutput>;
    type ExecStream = Answers<api::ExecOutput>;
    type EventsStream = Answers<api::Event>;
    type PortForwardStream = Answers<api::PortOutput>;
    type ServeMountStream = Answers<api::MountOutput>;

    async fn configure_sandbox(
        &self,
        request: Request<api::ConfigureSandboxRequest>,
    ) -> Result<Response<api::ConfigureSandboxResponse>, Status> {
        let agent = Arc::clone(&self.0);
        finish(async move { sandbox::configure(&agent, request.into_inner()).await }).await
    }

    async fn create_container(
        &self,
        request: Request<api::CreateContainerRequest>,
    ) -> Result<Response<api::CreateContainerResponse>, Status> {
        let agent = Arc::clone(&self.0);
        finish(async move { container::create(&agent, request.into_inner()).await }).await
    }

    async fn start_container(
        &self,
        request: Request<api::StartContainerRequest>,
    ) -> Result<Response<api::StartContainerResponse>, Status> {
        let agent = Arc::clone(&self.0);
        finish(async move { container::start(&agent, &request.into_inner().container_id).await })
            .await
    }

    async fn signal_container(
        &self,
        request: Request<api::SignalContainerRequest>,
    ) -> Result<Response<api::SignalContainerResponse>, Status> {
        container::send_signal(&self.0, request.get_ref())?;
        Ok(Response::new(api::SignalContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<api::RemoveContainerRequest>,
    ) -> Result<Response<api::RemoveContainerResponse>, Status> {
        let agent = Arc::clone(&self.0);
        finish(async move {
            container::remove(&agent, &request.into_inner().container_id).await?;
            Ok(api::RemoveContainerResponse {})
        })
        .await
    }

    async fn container_io(
        &self,
        request: Request<Streaming<api::IoInput>>,
    ) -> Result<Response<Self::ContainerIoStream>, Status> {
        let mut inputs = request.into_inner();
        let first =
            inputs.message().await?.ok_or_else(|| Error::invalid("no container was named"))?;
        let container = self.0.container(&first.container_id)?;
        let streams = container.take_streams()?;
        let (answers, receiver) = mpsc::channel(WAITING);
        tokio::spawn(attach::run(container, streams, first, inputs, answers));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn exec(
        &self,
        request: Request<Streaming<api::ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let mut inputs = request.into_inner();
        let first = inputs.message().await?.and_then(|message| message.kind);
        let Some(exec_input::Kind::Start(start)) = first else {
            return Err(Error::invalid("the first message of Exec is its start").into());
        };
        let (answers, receiver) = mpsc::channel(WAITING);
        tokio::spawn(exec::run(Arc::clone(&self.0), start, inputs, answers));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn update_container(
        &self,
        request: Request<api::UpdateContainerRequest>,
    ) -> Result<Response<api::UpdateContainerResponse>, Status> {
        let agent = Arc::clone(&self.0);
        finish(async move { container::update(&agent, request.into_inner()).await }).await
    }

    async fn limit_pod(
        &self,
        request: Request<api::LimitPodRequest>,
    ) -> Result<Response<api::LimitPodResponse>, Status> {
        let agent = Arc::clone(&self.0);
        finish(async move { pod_limit::limit(&agent, &request.into_inner()).await }).await
    }

    async fn set_processors(
        &self,
        request: Request<api::SetProcessorsRequest>,
    ) -> Result<Response<api::SetProcessorsResponse>, Status> {
        let (boundary, request) = (self.0.config.boundary, request.into_inner());
        finish(async move { processors::set(boundary, request).await }).await
    }

    async fn find_disk(
        &self,
        request: Request<api::FindDiskRequest>,
    ) -> Result<Response<api::FindDiskResponse>, Status> {
        let target = request.into_inner().target;
        let boundary = self.0.config.boundary;
        finish(async move { disks::find(boundary, target).await }).await
    }

    async fn stats(
        &self,
        request: Request<api::StatsRequest>,
    ) -> Result<Response<api::StatsResponse>, Status> {
        let agent = Arc::clone(&self.0);
        finish(async move { stats::read(&agent, request.into_inner()).await }).await
    }

    async fn port_forward(
        &self,
        request: Request<Streaming<api::PortInput>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        let mut inputs = request.into_inner();
        let first = inputs.message().await?.ok_or_else(|| Error::invalid("no port was named"))?;
        let stream = port_forward::connect(&self.0, first.port).await?;
        let (answers, receiver) = mpsc::channel(WAITING);
        tokio::spawn(port_forward::run(stream, first, inputs, answers));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn volume_mounts(
        &self,
        request: Request<api::VolumeMountsRequest>,
    ) -> Result<Response<api::VolumeMountsResponse>, Status> {
        let agent = Arc::clone(&self.0);
        let known = request.into_inner().known;
        finish(async move { agent.volume_mounts.list(known).await }).await
    }

    async fn serve_mount(
        &self,
        request: Request<Streaming<api::MountInput>>,
    ) -> Result<Response<Self::ServeMountStream>, Status> {
        let mut inputs = request.into_inner();
        let first = inputs.message().await?.ok_or_else(|| Error::invalid("no mount was named"))?;
        let (answers, receiver) = mpsc::channel(WAITING);
        let agent = Arc::clone(&self.0);
        tokio::spawn(volume_mounts::serve(agent, first, inputs, answers));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn events(
        &self,
        _request: Request<api::EventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let agent = Arc::clone(&self.0);
        let (answers, receiver) = mpsc::channel(WAITING);
        tokio::spawn(async move {
            let mut changes = agent.events.changes();
            let mut seen = 0;
            loop {
                changes.borrow_and_update();
                let (events, last) = agent.events.after(seen);
                seen = last;
                for event in events {
                    if answers.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    () = answers.closed() => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
