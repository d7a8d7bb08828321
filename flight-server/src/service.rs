//! The Flight trait: each method hands its request to the file that knows it, and turns a
//! [`Failure`] into a status.

use std::pin::Pin;
use std::sync::Arc;

use arrow_flight::flight_service_server::FlightService;
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightInfo,
    HandshakeRequest, HandshakeResponse, PollInfo, PutResult, SchemaResult, Ticket,
};
use futures::{Stream, StreamExt, stream};
use pinion_feature_store::Store;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::command::CommandError;
use crate::config::ServerConfig;
use crate::connection::Peer;
use crate::error::Failure;
use crate::hooks::Hooks;
use crate::intake::Received;
use crate::lane::Leases;
use crate::senders::Senders;
use crate::{action, bulk, info, measure, put};

/// Smallest message size a request may ask for.
const MIN_MESSAGE_BYTES: u64 = 64 << 10;

/// What every request needs.
pub(crate) struct Context {
    pub(crate) store: Store,
    pub(crate) hooks: Hooks,
    pub(crate) config: ServerConfig,
    /// One permit per open DoGet stream.
    pub(crate) scans: Arc<Semaphore>,
    /// One permit per step of a DoGet stream that is being worked off.
    pub(crate) steps: Arc<Semaphore>,
    /// One permit per request that waits for a barrier.
    pub(crate) waiters: Semaphore,
    /// Which streams are sent while lookups come.
    pub(crate) senders: Arc<Senders>,
    /// Who holds which mapped files.
    pub(crate) leases: Arc<Leases>,
}

pub(crate) type SharedContext = Arc<Context>;

impl Context {
    pub(crate) fn new(store: Store, hooks: Hooks, config: ServerConfig) -> SharedContext {
        let scans = Arc::new(Semaphore::new(config.max_scans));
        let steps = Arc::new(Semaphore::new(config.scan_threads));
        let waiters = Semaphore::new(config.max_waiters);
        let senders = Senders::new(bulk::threads());
        let leases = Leases::new(config.lane.leased_max_bytes, config.lane.lease_term);
        Arc::new(Context {
            store,
            hooks,
            config,
            scans,
            steps,
            waiters,
            senders,
            leases,
        })
    }

    /// The permit of one more DoGet stream.
    pub(crate) fn scan_permit(&self) -> Result<OwnedSemaphorePermit, Failure> {
        Arc::clone(&self.scans).try_acquire_owned().map_err(|_| {
            Failure::new(
                Code::ResourceExhausted,
                "TOO_MANY_SCANS",
                format!(
                    "{} DoGet streams are open, the most allowed (max_scans); read or close some, or try again",
                    self.config.max_scans
                ),
            )
        })
    }

    /// The message size for a request that asked for `wanted`.
    pub(crate) fn message_limit(&self, wanted: Option<u64>) -> Result<usize, Failure> {
        let cap = self.config.max_message_cap_bytes;
        match wanted {
            None => Ok(self.config.max_message_bytes),
            Some(wanted) => usize::try_from(wanted)
                .ok()
                .filter(|_| (MIN_MESSAGE_BYTES..=cap as u64).contains(&wanted))
                .ok_or_else(|| {
                    CommandError::member(
                        "max_message_bytes",
                        format!("{wanted}; it must lie between {MIN_MESSAGE_BYTES} and {cap}"),
                    )
                    .into()
                }),
        }
    }
}

/// Serves the Flight protocol.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) context: SharedContext,
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Runs a request and records what became of it.
async fn answer<T>(
    method: &'static str,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<Response<T>, Status> {
    let request = measure::Request::start(method);
    match work.await {
        Ok(reply) => {
            request.finish(Code::Ok);
            Ok(Response::new(reply))
        }
        Err(failure) => {
            request.finish(failure.code());
            Err(failure.into())
        }
    }
}

/// As `answer`, for a reply that is a stream: it ends when the stream does.
async fn answer_stream<T: Send + 'static>(
    method: &'static str,
    work: impl Future<Output = Result<Replies<T>, Failure>>,
) -> Result<Response<Replies<T>>, Status> {
    let request = measure::Request::start(method);
    match work.await {
        Ok(replies) => {
            let measured = stream::unfold(
                (replies, Some(request), Code::Ok),
                |(mut replies, mut request, mut code)| async move {
                    match replies.next().await {
                        Some(item) => {
                            if let Err(status) = &item {
                                code = status.code();
                            }
                            Some((item, (replies, request, code)))
                        }
                        None => {
                            if let Some(request) = request.take() {
                                request.finish(code);
                            }
                            None
                        }
                    }
                },
            );
            Ok(Response::new(Box::pin(measured)))
        }
        Err(failure) => {
            request.finish(failure.code());
            Err(failure.into())
        }
    }
}

/// Where the service is called without `wire::Layer` around it.
fn unlayered() -> Failure {
    Failure::new(
        Code::Internal,
        "UNLAYERED",
        "the layer around the service, which handles the bodies of this method, is missing",
    )
}

fn list<T: Send + 'static>(items: Vec<T>) -> Replies<T> {
    Box::pin(stream::iter(items.into_iter().map(Ok)))
}

#[tonic::async_trait]
impl FlightService for Service {
    type HandshakeStream = Replies<HandshakeResponse>;
    type ListFlightsStream = Replies<FlightInfo>;
    type DoGetStream = Replies<FlightData>;
    type DoPutStream = Replies<PutResult>;
    type DoExchangeStream = Replies<FlightData>;
    type DoActionStream = Replies<arrow_flight::Result>;
    type ListActionsStream = Replies<ActionType>;

    async fn handshake(
        &self,
        _request: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Self::HandshakeStream>, Status> {
        Err(Failure::new(
            Code::Unimplemented,
            "UNIMPLEMENTED",
            "this server authenticates nobody and needs no handshake; call the other methods directly",
        )
        .into())
    }

    async fn list_flights(
        &self,
        request: Request<Criteria>,
    ) -> Result<Response<Self::ListFlightsStream>, Status> {
        let criteria = request.into_inner().expression;
        answer("ListFlights", async {
            Ok(list(info::list(&self.context, &criteria)?))
        })
        .await
    }

    async fn get_flight_info(
        &self,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        answer(
            "GetFlightInfo",
            info::describe(&self.context, request.into_inner()),
        )
        .await
    }

    async fn poll_flight_info(
        &self,
        _request: Request<FlightDescriptor>,
    ) -> Result<Response<PollInfo>, Status> {
        Err(Failure::new(
            Code::Unimplemented,
            "UNIMPLEMENTED",
            "every request is ready at once; use GetFlightInfo",
        )
        .into())
    }

    async fn get_schema(
        &self,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<SchemaResult>, Status> {
        answer("GetSchema", async {
            let info = info::describe(&self.context, request.into_inner()).await?;
            Ok(SchemaResult {
                schema: info.schema,
            })
        })
        .await
    }

    async fn do_get(
        &self,
        _request: Request<Ticket>,
    ) -> Result<Response<Self::DoGetStream>, Status> {
        Err(unlayered().into())
    }

    async fn do_put(
        &self,
        request: Request<Streaming<FlightData>>,
    ) -> Result<Response<Self::DoPutStream>, Status> {
        let incoming = request.extensions().get().and_then(Received::take);
        let peer = request.extensions().get::<Peer>();
        answer_stream("DoPut", async {
            match (incoming, peer) {
                (Some(incoming), Some(peer)) => {
                    put::put(&self.context, incoming, &peer.class).await
                }
                _ => Err(unlayered()),
            }
        })
        .await
    }

    async fn do_exchange(
        &self,
        _request: Request<Streaming<FlightData>>,
    ) -> Result<Response<Self::DoExchangeStream>, Status> {
        Err(unlayered().into())
    }

    async fn do_action(
        &self,
        request: Request<Action>,
    ) -> Result<Response<Self::DoActionStream>, Status> {
        let context = Arc::clone(&self.context);
        answer("DoAction", async {
            let value = action::act(context, request.into_inner()).await?;
            Ok(list(vec![arrow_flight::Result {
                body: value.to_string().into(),
            }]))
        })
        .await
    }

    async fn list_actions(
        &self,
        _request: Request<Empty>,
    ) -> Result<Response<Self::ListActionsStream>, Status> {
        answer("ListActions", async { Ok(list(action::list())) }).await
    }
}
