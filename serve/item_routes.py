"""Routes about the index's items: listed, counted, heard, seen."""

from typing import Annotated, Literal

import orjson
from fastapi import FastAPI, Header, Query
from starlette.responses import Response

from audiomae.config import nearest
from serve import answers, media, openapi
from serve.problems import Problem, responses
from serve.queries import check_filter
from serve.reading import GATED, FilterText
from serve.schema import ExamplesResponse, FacetsResponse, ItemResponse, ItemsResponse, MapResponse, WaveformResponse
from serve.service import SearchService


def add_item_routes(app: FastAPI, service: SearchService) -> None:
    """Add them to `app`."""

    @app.get("/items", tags=["items"], response_model=ItemsResponse, responses=responses(422, 431, *GATED))
    async def items(
        filter: FilterText = None,
        offset: Annotated[int, Query(ge=0, le=10**12)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    ) -> Response:
        """Items of the index, in its order; facets of the same filter are at /facets."""
        serving = await service.release.current()
        checked = check_filter(filter, serving.catalogue.columns)
        total, rows = await service.filtered(serving.catalogue.items, checked, offset, limit)
        shown = [answers.shown(row) for row in rows]
        return answers.json_response({"release": serving.version, "total": total, "items": shown})

    @app.get("/facets", tags=["items"], response_model=FacetsResponse, responses=responses(422, 431, *GATED))
    async def facets(filter: FilterText = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> Response:
        """What the items' columns hold, with counts: of all items, or of those that a filter lets through."""
        serving = await service.release.current()
        checked = check_filter(filter, serving.catalogue.columns)
        text = orjson.dumps(checked, option=orjson.OPT_SORT_KEYS).decode() if checked else None
        return answers.json_response(await service.filtered(serving.catalogue.facets, text, limit))

    @app.get("/examples", tags=["items"], response_model=ExamplesResponse, responses=responses(431, *GATED))
    async def examples() -> Response:
        """Six items to begin with: playable, and as different as the columns say."""
        serving = await service.release.current()
        rows = await service.lanes.run("media", 1, media.playable_examples, serving.catalogue)
        return answers.json_response({"release": serving.version, "items": [answers.shown(row) for row in rows]})

    @app.get("/map", tags=["items"], response_model=MapResponse, responses=responses(404, 422, 431, *GATED))
    async def map_points(colour: Annotated[str | None, Query(max_length=200)] = None) -> Response:
        """Where the sounds lie on the map, and the values of one column to colour them by."""
        serving = await service.release.current()
        if colour is not None and colour not in serving.catalogue.columns:
            hint = nearest(colour, serving.catalogue.columns)
            raise Problem(422, "unknown_column", f"colour: no column {colour!r}{hint}")
        found = await service.lanes.run("light", 1, serving.catalogue.map, colour)
        if found is None:
            raise Problem(404, "no_map", f"release {serving.version} was built without a map; build the index again")
        return answers.json_response(found)

    _add_routes_of_an_item(app, service)


def _add_routes_of_an_item(app: FastAPI, service: SearchService) -> None:
    @app.get("/items/{clip}", tags=["items"], response_model=ItemResponse, responses=responses(404, 422, 431, *GATED))
    async def item(clip: int) -> Response:
        """One row of the items table."""
        serving, row = await service.item(clip)
        return answers.json_response({"release": serving.version, **answers.shown(row)})

    @app.get(
        "/items/{clip}/audio",
        tags=["items"],
        response_class=Response,
        responses=openapi.binary("audio/*", 206) | responses(404, 416, 422, 431, *GATED),
    )
    async def item_audio(
        clip: int,
        format: Annotated[Literal["original", "wav"], Query()] = "original",
        range: Annotated[str | None, Header()] = None,
    ) -> Response:
        """The item's file as it lies in the corpus (byte ranges supported), or its own window as WAV."""
        serving, row = await service.item(clip)
        root = serving.catalogue.index.corpus_root(row)
        return await service.lanes.run("media", 1, media.audio_response, root, row, format, range)

    @app.get(
        "/items/{clip}/waveform",
        tags=["items"],
        response_model=WaveformResponse,
        responses=responses(404, 422, 431, *GATED),
    )
    async def item_waveform(clip: int) -> Response:
        """The outline of the item's file: all of it up to a minute, else the minute around the item."""
        serving, row = await service.item(clip)
        root = serving.catalogue.index.corpus_root(row)
        found = await service.lanes.run("media", 1, media.waveform, root, row)
        response = answers.json_response(found)
        response.headers["Cache-Control"] = media.HEADERS["Cache-Control"]
        return response

    @app.get(
        "/items/{clip}/spectrogram.png",
        tags=["items"],
        response_class=Response,
        responses=openapi.binary("image/png") | responses(404, 422, 431, *GATED),
    )
    async def item_spectrogram(clip: int) -> Response:
        """A picture of the item's sound: log-mel, time to the right, pitch upwards."""
        serving, row = await service.item(clip)
        root = serving.catalogue.index.corpus_root(row)
        return await service.lanes.run("media", 1, media.spectrogram_response, root, row)
