"""How the judges' results are read."""



from server.doctor.result import State

GIB = 2**30
OK, WARNING, PROBLEM = State.OK, State.WARNING, State.PROBLEM


def judged(result, state, *words):
    """The result is of that state, says those words in English, and everything in both languages."""
    assert result.state is state, result
    for word in words:
        assert word in result.finding.en or (result.advice and word in result.advice.en), result
    assert result.finding.zh and result.finding.en
    assert state is OK or result.advice is None or (result.advice.zh and result.advice.en)
    return result
