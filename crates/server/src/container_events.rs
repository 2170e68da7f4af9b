//! GetContainerEvents: what happens to sandboxes and containers, as it happens.

use crate::{
    container_status,
    node::Node,
    sandbox::{Happening, HappeningKind, Sandboxes},
    sandbox_status,
};
use a3s_box_api::cri;
use futures::stream;
use std::sync::Arc;
use tokio_stream::Stream;
use tonic::Status;

/// The events from now on, and before them those that nobody could be told. A client that does not keep
/// up misses some and hears of it by the end of the stream, as of the server's end: it has to list anew.
pub fn get_container_events(
    node: &Arc<Node>,
) -> impl Stream<Item = Result<cri::ContainerEventResponse, Status>> + Send + use<> {
    let sandboxes = node.sandboxes.clone();
    let listener = sandboxes.deps().events.listen();
    stream::unfold(Some((listener, sandboxes)), |state| async {
        let (mut listener, sandboxes) = state?;
        Some(match listener.next().await {
            Some(Ok(happening)) => (Ok(event(&sandboxes, &happening)), Some((listener, sandboxes))),
            Some(Err(missed)) => (Err(Status::data_loss(missed.to_string())), None),
            None => (Err(Status::unavailable("the server ends")), None),
        })
    })
}

fn event(sandboxes: &Sandboxes, happening: &Happening) -> cri::ContainerEventResponse {
    let kind = match happening.kind {
        HappeningKind::Created => cri::ContainerEventType::ContainerCreatedEvent,
        HappeningKind::Started => cri::ContainerEventType::ContainerStartedEvent,
        HappeningKind::Stopped => cri::ContainerEventType::ContainerStoppedEvent,
        HappeningKind::Deleted => cri::ContainerEventType::ContainerDeletedEvent,
    };
    let view = sandboxes.get(happening.sandbox.as_str()).ok().map(|sandbox| sandbox.view());
    // A sandbox's own events carry its id where a container's would stand.
    let id = match &happening.container {
        Some(container) => container.to_string(),
        None => happening.sandbox.to_string(),
    };
    cri::ContainerEventResponse {
        container_id: id,
        container_event_type: kind.into(),
        created_at: happening.at,
        pod_sandbox_status: view.as_ref().map(|view| sandbox_status::status(view)),
        containers_statuses: view.map(|view| container_status::all(&view)).unwrap_or_default(),
    }
}
